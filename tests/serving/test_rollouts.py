"""When the adapter is loaded anew. Answers are compared in `test_vllm.py`, with the real vLLM."""

import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from peft_loramoe.serving.rollouts import VLLMRollouts
from tiny import loramoe


class Engine:
    """Answers nothing, and counts the adapters that it was sent."""

    def __init__(self):
        self.sent, self.slots = 0, set()
        self.llm_engine = SimpleNamespace(
            add_lora=self.add, remove_lora=self.slots.remove, list_loras=lambda: self.slots
        )

    def add(self, request):
        self.sent += 1
        self.slots.add(request.number)

    def generate(self, prompts, *args, **options):
        return []


def trainer(state=None, training=True):
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")
    return SimpleNamespace(
        args=SimpleNamespace(generation_kwargs=None, **dict.fromkeys(names)),
        accelerator=SimpleNamespace(num_processes=1, unwrap_model=lambda model: model),
        state=TrainerState() if state is None else state,
        is_in_train=training,
        model=loramoe(),
    )


@pytest.fixture
def engine(monkeypatch):
    def request(name, number, path):
        return SimpleNamespace(number=number, lora_int_id=number)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))
    return Engine()


SAME_RUN = {"state": TrainerState(global_step=3)}
CALLS = {
    "the same step": (SAME_RUN, SAME_RUN, 1),
    "another trainer or run at the same step": ({}, {}, 2),
    "outside of training": (SAME_RUN, {**SAME_RUN, "training": False}, 2),
    "twice outside of training": ({**SAME_RUN, "training": False}, {**SAME_RUN, "training": False}, 2),
}


@pytest.mark.parametrize(("first", "second", "sent"), CALLS.values(), ids=CALLS)
def test_the_adapter_is_sent_again_where_it_may_have_changed(first, second, sent, engine):
    rollouts = VLLMRollouts(engine)
    rollouts([], trainer(**first))
    rollouts([], trainer(**second))
    assert (engine.sent, len(engine.slots)) == (sent, 1)


def test_the_adapter_is_sent_again_after_a_step(engine):
    rollouts, training = VLLMRollouts(engine), trainer()
    for step in (0, 0, 1, 2, 2):
        training.state.global_step = step
        rollouts([], training)
    assert engine.sent == 3
