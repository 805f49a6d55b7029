"""torch.compile: one graph, the same numbers."""

import pytest
import torch

from tiny import labelled, loramoe, token_batch


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "null_groups": [0], "balance_detach": True}], ids=["dense", "sparse"])
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_gradients(options):
    batch, task_types = labelled(token_batch()), torch.tensor([0, 1, -1])
    results = []
    for compiled in (False, True):
        model = loramoe(**options)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = call(**batch, task_types=task_types).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1])
