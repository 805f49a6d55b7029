import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import anchors, measure, methods, moe, report, rows, targets
from benchmarks.__main__ import main
from benchmarks.cases import CPU_LAYER, KINDS, SETS
from benchmarks.environment import ROOT


pytestmark = pytest.mark.version_independent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both sets, tiny, without the released peers."""
    folder = tmp_path_factory.mktemp("results")
    for name in SETS:
        main([name, "--smoke", "--output", str(folder / f"{name}.json"), "--peers", str(folder / "none")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS, ids="{} set".format)  # "gpu" alone would read as the marker
def test_every_variant_runs_or_says_why_not(results, name):
    result = json.loads((results / f"{name}.json").read_text())
    assert {row["group"] for row in result["rows"]} == {case.group for case in SETS[name]}
    assert {"date", "commit", "device", "versions"} <= set(result["about"])
    for row in result["rows"]:
        if "skipped" in row:
            assert row["config"]["method"] in methods.PEERS or row["config"]["liger"]
            assert "not installed" in row["skipped"] or "need a CUDA device" in row["skipped"]
        else:
            assert len(row["rounds"]) == 2 and 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
            assert row["cpu_seconds"][1] > 0 and row["peak_bytes"] > 0
            assert ("saved_bytes" in row) == (row["kind"] != "decode" and not row["config"].get("compile"))


@pytest.mark.slow
def test_tables_show_every_row(results, capsys):
    report.main(["--results", str(results)])
    lines = capsys.readouterr().out.splitlines()
    measured = [row for name in SETS for row in json.loads((results / f"{name}.json").read_text())["rows"]]
    assert sum(line.startswith("| ") and not line.startswith(("| ---", "| case")) for line in lines) == len(measured)


@pytest.mark.slow
def test_figures(results, tmp_path):
    report.main(["--results", str(results), "--images", str(tmp_path), "--plots"])
    names = {f"performance-{name}-{kind}.png" for name in SETS for kind in ("steps", "scaling")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_without_results_the_report_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        report.main(["--results", str(tmp_path)])
    assert "make bench" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["gpu"], ["gpu", "--summary"]], ids=str)
def test_without_the_gpu_set_its_tables_are_refused(options, tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": layer_rows(0, 1.0, 2.0)}))
    with pytest.raises(SystemExit, match="1"):
        report.main([*options, "--results", str(tmp_path)])
    assert "No result of the gpu set" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_set_is_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["gpu"])
    assert "needs a CUDA device" in capsys.readouterr().err


def test_an_unknown_group_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["cpu", "--only", "layr"])
    assert "--only layr names no group of the cpu set; there are 4-bit layer," in capsys.readouterr().err


# --- measuring


def test_rounds_time_every_step_once_in_changing_order():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleave(steps, measure.Timer(CPU), rounds=8, shortest=1.0)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 8 and all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 1
    assert [len(times[name].wall) for name in "abc"] == [8] * 3


def test_short_steps_are_repeated():
    calls = []
    measure.interleave(
        {"a": lambda: calls.append(1)}, measure.Timer(CPU), rounds=2, shortest=measure.SHORTEST["cpu"] / 7
    )
    assert len(calls) == 14


def test_a_disturbed_round_does_not_change_the_ratio():
    disturbance = [1.0, 9.0, 2.0, 1.0, 30.0]
    ours, theirs = ({"rounds": [seconds * d for d in disturbance]} for seconds in (3.0, 2.0))
    assert rows.ratio(ours, theirs) == pytest.approx([1.5] * 3)


def test_peak_bytes():
    def step():
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        torch.zeros(100).add_(second.sum())

    assert 6000 <= measure.peak_bytes(step, CPU) <= 6100


# --- methods


def test_the_loop_computes_what_the_package_computes():
    config = {**CPU_LAYER, "in_features": 20, "out_features": 12, "tokens": 7, "dtype": "float32", "dropout": 0.0}
    base = KINDS["layer"].base(config, CPU)
    loop, ours = (
        KINDS["layer"].setup({**config, "method": method, "adapter_dtype": "float32"}, base)[0]
        for method in ("loop", "loramoe")
    )
    experts = ours.loramoe_experts["default"]
    with torch.no_grad():
        experts.B.normal_()
        loop.router.weight.copy_(experts.router)
        for i, (A, B) in enumerate(zip(loop.A, loop.B)):
            A.weight.copy_(experts.A[i * 4 : i * 4 + 4])
            B.weight.copy_(experts.B[:, i * 4 : i * 4 + 4])
    x = torch.randn(7, 20)
    torch.testing.assert_close(loop(x), ours(x))


def test_variants_share_the_base_weights_and_nothing_else():
    config = {**CPU_LAYER, "in_features": 20, "out_features": 12, "tokens": 7}
    base = KINDS["layer"].base(config, CPU)
    layers = [
        KINDS["layer"].setup({**config, "method": m, "adapter_dtype": "float32"}, base)[0] for m in ("lora", "loramoe")
    ]
    assert all(layer.base_layer.weight is base.linear.weight for layer in layers)
    assert isinstance(base.linear, torch.nn.Linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "loop", "loramoe"])
def test_adapters_have_the_dtype_of_the_config(method, dtype):
    config = {**CPU_LAYER, "in_features": 20, "out_features": 12, "method": method, "adapter_dtype": dtype}
    layer, _ = KINDS["layer"].setup(config, KINDS["layer"].base(config, CPU))
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {getattr(torch, dtype)}


FUSED_RANKS = {"unsloth": 24, "lorafusion": 16}  # a scaling other than 1


def assert_fused_lora_is_the_formula(method, adapter_dtype, dropout, device):
    """Output and gradients of a fused LoRA, against base and LoRA in float64.

    A, B and the output's gradient are positive, so that LoRA's part of the input's gradient is zero only where x was
    dropped: that tells the mask, however it was drawn.
    """
    sizes = {"in_features": 256, "out_features": 512, "tokens": 128, "experts": FUSED_RANKS[method] // 4}
    config = {**CPU_LAYER, **sizes, "dropout": dropout, "method": method, "adapter_dtype": adapter_dtype}
    layer, inputs = KINDS["layer"].setup(config, KINDS["layer"].base(config, device))
    A, B = sorted((p for p in layer.parameters() if p.requires_grad), key=len)  # (rank, in), (out, rank)
    W = next(p for p in layer.parameters() if not p.requires_grad)
    with torch.no_grad():
        for adapter in (A, B):
            adapter.uniform_(0.02, 0.06)
    x = inputs["x"]
    output = layer(x)
    function = output.grad_fn.next_functions[0][0].name()
    assert function == {"unsloth": "LoRA_WBackward", "lorafusion": "FusedLinearLoRABackward"}[method]
    gradient = torch.rand_like(output) + 0.5
    got = torch.autograd.grad(output, [x, A, B], gradient)

    scaling = methods.LORA_ALPHA / FUSED_RANKS[method]
    x, W, A, B, gradient = (tensor.detach().double() for tensor in (x, W, A, B, gradient))
    through_base, through_lora = gradient @ W, scaling * gradient @ B @ A
    mask = (got[0].double() - through_base) > through_lora / 2
    assert abs((~mask).double().mean().item() - dropout) < 0.02
    keep = mask / (1 - dropout)
    dropped = x * keep
    wanted = {
        "output": x @ W.T + scaling * dropped @ A.T @ B.T,
        "input": through_base + through_lora * keep,
        "A": scaling * (gradient @ B).T @ dropped,
        "B": scaling * gradient.T @ (dropped @ A.T),
    }
    for (name, want), tensor in zip(wanted.items(), (output, *got)):
        assert (tensor.double() - want).norm() / want.norm() < 0.01, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "adapter_dtype", "dropout"),
    [
        ("unsloth", "float32", 0.0),
        ("unsloth", "bfloat16", 0.0),
        ("unsloth", "float32", 0.25),
        ("unsloth", "bfloat16", 0.25),
        ("lorafusion", "bfloat16", 0.25),
    ],
)
def test_fused_lora_is_the_formula(method, adapter_dtype, dropout, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "build" / "peers")])
    if importlib.util.find_spec(method) is None:
        pytest.skip(f"{method} is not in build/peers")
    assert_fused_lora_is_the_formula(method, adapter_dtype, dropout, torch.device("cuda"))


@pytest.mark.parametrize("changes", [{"dropout": 0.0}, {"experts": 6}, {"in_features": 64}], ids=str)
def test_lorafusion_says_what_it_cannot_adapt(changes, monkeypatch):
    monkeypatch.setattr(methods, "_need", lambda package: None)
    config = {**CPU_LAYER, "experts": 8, **changes, "method": "lorafusion", "adapter_dtype": "bfloat16"}
    with pytest.raises(methods.Unavailable, match="without dropout|power of two|no multiple of 256"):
        KINDS["layer"].setup(config, KINDS["layer"].base(config, CPU))


# --- targets


def layer_rows(case, ours, theirs, dropout=0.0):
    measured = []
    for method, seconds in (("lora", theirs), ("loramoe", ours)):
        config = {**CPU_LAYER, "dropout": dropout, "method": method, "adapter_dtype": "float32"}
        times = {"seconds": [seconds] * 3, "cpu_seconds": [seconds] * 3, "rounds": [seconds] * 5}
        row = {"group": "layer", "case": case, "kind": "layer", "config": config, "saved_bytes": 10, "peak_bytes": 10}
        measured.append({**row, **times})
    return measured


def test_targets_are_checked_in_every_case_and_missing_ones_are_listed():
    measured = layer_rows(0, 1.0, 2.0) + layer_rows(1, 3.0, 2.0, dropout=0.05)
    comparisons = targets.check({"cpu": {"rows": measured}})
    against_lora = [
        (case, value)
        for target, case, value, _ in comparisons
        if target == "cpu, layer: seconds / PEFT LoRA with the same adapter dtype"
    ]
    assert against_lora == [("dropout 0.0; float32 adapters", 0.5), ("dropout 0.05; float32 adapters", 1.5)]
    unmeasured = [
        value for name, _, value, _ in comparisons if name.startswith("gpu") or "loop" in name or "frozen" in name
    ]
    assert set(unmeasured) == {None}


def test_the_check_says_which_targets_are_missed(tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": layer_rows(0, 3.0, 2.0)}))
    report.main(["--results", str(tmp_path), "--check"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.500 MISSED  <= 1.000  cpu, layer: seconds / PEFT LoRA")
    assert any(line.startswith("1.000 ok      <= 1.050  cpu, layer: saved bytes / PEFT LoRA") for line in lines)
    assert lines[-1].startswith("not measured")


# --- anchors


def test_the_benchmark_of_anchors_writes_what_it_prints(tmp_path, capsys):
    for batches in (list(anchors.BATCHES), ["20x26"]):
        options = ["--smoke", "--rounds", "2", "--output", str(tmp_path / "anchors.json")]
        anchors.main([*options, "--batches", *batches])
    results = json.loads((tmp_path / "anchors.json").read_text())
    assert list(results) == list(anchors.BATCHES)
    for result in results.values():
        assert {"date", "commit", "device", "versions"} <= set(result["about"])
        assert [row["variant"] for row in result["rows"]] == list(anchors.VARIANTS)
        assert all(len(row["rounds"]) == 2 and row["ratio"] > 0 for row in result["rows"])
        assert result["rows"][0]["ratio"] == 1
    assert capsys.readouterr().out.strip().endswith(anchors.table(results))


# --- mixture-of-experts backbones


def test_the_benchmark_of_sparse_blocks_writes_what_it_prints(tmp_path, capsys):
    moe.main(["--smoke", "--rounds", "2", "--output", str(tmp_path / "moe.json")])
    measured = json.loads((tmp_path / "moe.json").read_text())["rows"]
    assert [row["method"] for row in measured] == [*moe.CONFIGS] * len(moe.EXPERTS)
    assert capsys.readouterr().out.strip().endswith(moe.table(measured))
    ours = [row["parameters"] for row in measured if row["method"].startswith("LoRAMoE")]
    assert ours[0] == ours[1]  # whatever the number of routed experts
