"""A recording begins and ends with its call, whatever happens in between."""

import gc
import threading
import weakref

import pytest
import torch

from peft_loramoe import balance_loss, balance_terms, collect_balance, layer_routing
from tiny import labelled, loramoe, tiny_llama, token_batch


TYPES = torch.tensor([0, 1, -1])


@pytest.fixture
def batch():
    return labelled(token_batch())


def test_collecting_inside_collecting_is_refused_and_leaves_the_outer_one(batch):
    model = loramoe()
    model(**batch, task_types=TYPES)
    expected = balance_loss(model)
    with collect_balance(model, TYPES):
        model(**batch)
        with pytest.raises(RuntimeError, match="collect_balance is open already"), collect_balance(model):
            pass
    torch.testing.assert_close(balance_loss(model), expected)


@pytest.mark.parametrize("below_head", [False, True], ids=["whole model", "below the head"])
def test_a_call_inside_a_call_leaves_the_outer_recording_alone(batch, below_head):
    model = loramoe()
    expected = model(**batch, task_types=TYPES).loss
    inner = model.base_model.model.model if below_head else model
    reached = []

    def distill(module, args, output):
        if not reached:
            reached.append(True)
            with torch.no_grad():
                inner(input_ids=batch["input_ids"][:1])

    model.base_model.model.model.layers[0].register_forward_hook(distill)
    torch.testing.assert_close(model(**batch, task_types=TYPES).loss, expected)
    assert reached
    assert layer_routing(model)[0].token_counts.tolist() == [7, 6, 5]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("below_head", [False, True], ids=["whole model", "below the head"])
def test_a_call_that_raised_leaves_nothing_behind(batch, error, below_head):
    model = loramoe()
    layer = model.base_model.model.model.layers[1]

    def fail(*_):
        raise error

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(**batch, task_types=TYPES)
    handle.remove()
    tokens = {name: tensor[:2] for name, tensor in token_batch().items()}
    call = model.base_model.model.model if below_head else model
    for _ in range(3):
        call(**tokens, task_types=TYPES[:2])
    assert len(layer_routing(model)) == 6
    assert layer_routing(model)[0].task_types.tolist() == [0, 1]


@pytest.mark.parametrize("between", ["evaluation", "reference without adapter"])
def test_a_pass_without_gradient_does_not_hide_a_term_that_reached_no_loss(recwarn, between):
    model, tokens = loramoe(), token_batch()
    for _ in range(3):
        model.train()(**tokens, task_types=TYPES)
        with torch.no_grad():
            if between == "evaluation":
                model.eval()(**tokens, task_types=TYPES)
            else:
                with model.disable_adapter():
                    model(**tokens)
    assert sum("reached no loss" in str(warning.message) for warning in recwarn) == 1


def test_reading_the_term_of_another_pass_is_not_reading_the_training_pass(recwarn):
    model, tokens = loramoe(), token_batch()
    for _ in range(2):
        model.train()(**tokens, task_types=TYPES)
        with torch.no_grad():
            model(**tokens, task_types=TYPES)
        balance_loss(model)
    assert sum("reached no loss" in str(warning.message) for warning in recwarn) == 1


def run_in_threads(function, count=2):
    errors, barrier = [], threading.Barrier(count)

    def run(number):
        barrier.wait()
        try:
            function(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_threads_have_recordings_of_their_own(batch, training):
    model = loramoe().train(training)
    batches = [batch, labelled(token_batch(rows=2, width=5, seed=7))]
    types = [[0, 1, -1], [1, 0]]
    expected = [(model(**b, task_types=t).loss, balance_loss(model)) for b, t in zip(batches, types)]

    def call(number):
        for _ in range(20):
            loss = model(**batches[number], task_types=types[number]).loss
            torch.testing.assert_close((loss, balance_loss(model)), expected[number])

    run_in_threads(call)


def test_threads_have_adapter_names_of_their_own():
    model = loramoe()
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    tokens = token_batch(rows=2)
    names = [["default", "__base__"], ["other", "default"]]
    expected = [model(**tokens, adapter_names=chosen).logits for chosen in names]

    @torch.no_grad()
    def call(number):
        for _ in range(20):
            logits = model(**tokens, adapter_names=names[number]).logits
            torch.testing.assert_close(logits, expected[number])

    run_in_threads(call)


def test_the_cache_of_a_call_does_not_outlive_its_output():
    model = loramoe().eval()
    with torch.no_grad():
        output = model(**token_batch(), use_cache=True)
        output = model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=output.past_key_values)
    cache = weakref.ref(output.past_key_values)
    del output
    gc.collect()
    assert cache() is None
    assert len(layer_routing(model)) == 6


def test_the_inputs_of_a_call_do_not_outlive_it():
    model = loramoe()
    embeddings = tiny_llama().get_input_embeddings()(token_batch()["input_ids"]).detach()
    kept = weakref.ref(embeddings)
    model.eval()
    with torch.no_grad():
        model(inputs_embeds=embeddings)
    del embeddings
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("read", [balance_loss, balance_terms])
@pytest.mark.parametrize("labels", [True, False], ids=["in the loss", "unread"])
def test_the_term_of_a_deleted_adapter_is_refused(batch, read, labels):
    model = loramoe()
    model(**(batch if labels else token_batch()), task_types=TYPES)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="Adapter 'default' was deleted after the forward pass"):
        read(model)
