"""Tensor parallelism, on two processes.

A file of its own: to shut such an engine down is to end the parallel groups of every engine in this process.
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
    sharded = cases.start_vllm(model, tensor_parallel_size=2, fully_sharded_loras=fully_sharded)
    try:
        for i, name in enumerate(("all-linear", "top_k with null experts", "num_experts_pattern")):
            adapter = cases.save_adapter(model, tmp_path / str(i), cases.OPTIONS[name])
            answers = cases.ask_vllm(sharded, [adapter] * 3, ids={adapter: i + 1})
            wrong, largest = cases.differences(cases.with_adapter(model, adapter), answers)
            assert wrong == 0 and largest < 2e-4
    finally:
        sharded.llm_engine.engine_core.shutdown()
