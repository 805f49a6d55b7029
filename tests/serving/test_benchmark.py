"""The benchmark of serving, on a tiny model. Needs vLLM: `make test-vllm` installs it and runs these tests."""

import importlib.util
import json
import subprocess
import sys

import pytest
import serving_cases as cases


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"vLLM is not installed; {cases.INSTALL}"
)


def test_every_variant_is_timed(tmp_path):
    path = tmp_path / "serving.json"
    command = [sys.executable, "-m", "benchmarks.serving", "--smoke", "--rounds", "2", "--output", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(path.read_text())
    assert list(results) == ["1", "16"]
    for result in results.values():
        assert result["about"]["versions"]["vllm"]
        for row in result["rows"]:
            assert f"| {row['batch']} | {row['variant']} |" in printed
            assert min(row["next_token"]["rounds"] + row["first_token"]["rounds"]) > 0
        ratios = {row["variant"]: row["next_token"]["ratio"][1] for row in result["rows"]}
        assert ratios["LoRA"] == 1 and len(ratios) == 5
