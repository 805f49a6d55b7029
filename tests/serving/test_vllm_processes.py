"""Tensor parallelism on two processes. Needs vLLM: `make test-vllm` installs it and runs these tests.

Apart from test_vllm.py, since an engine that ends takes the process groups of all engines in its process with it.
"""

import importlib.util

import pytest
import serving_cases as cases


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=f"vLLM is not installed; {cases.INSTALL}"),
]


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["replicated", "fully sharded"])
def test_two_processes_share_the_layers(fully_sharded, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    model = cases.tiny_model(tmp_path / "model")
    engine = cases.start_vllm(model, tensor_parallel_size=2, fully_sharded_loras=fully_sharded)
    try:
        for i, name in enumerate(("all-linear", "top_k with null experts", "num_experts_pattern")):
            adapter = cases.save_adapter(model, tmp_path / str(i), cases.OPTIONS[name])
            answers = cases.ask_vllm(engine, [adapter] * 3, ids={adapter: i + 1})
            wrong, largest = cases.differences(cases.with_adapter(model, adapter), answers)
            assert wrong == 0
            assert largest < 2e-4
    finally:
        engine.llm_engine.engine_core.shutdown()
