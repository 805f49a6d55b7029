"""`VLLMRollouts`: vLLM writes the completions that GRPO trains on, with the adapter as it is at that step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


class VLLMRollouts:
    """A `rollout_func` for TRL's `GRPOTrainer`.

    TRL's own `use_vllm=True` sends vLLM weights with the adapter merged into them, which a mixture cannot be. This
    sends the adapter instead: it is saved and loaded into a LoRA slot whenever the trainer has made a step, and for
    each call outside of training.

    Args:
        engine: a `vllm.LLM` of the base model in this process, with `enable_lora=True` and `logprobs_mode=
            "processed_logprobs"`, so that the reported log-probabilities have the temperature in them.
        **sampling: further arguments of vLLM's `SamplingParams`; they override those of the trainer's configuration.

    Example::

        engine = LLM("Qwen/Qwen3-0.6B", enable_lora=True, max_lora_rank=64, logprobs_mode="processed_logprobs")
        trainer = GRPOTrainer(model=model, rollout_func=VLLMRollouts(engine), ...)  # use_vllm stays False
    """

    def __init__(self, engine: Any, **sampling: Any) -> None:
        self.engine, self.sampling = engine, sampling
        self._request: Any = None
        self._state: Any = None  # of the run, which each call of `train` begins anew
        self._step: int | None = None
        self._number = 10**6  # users count their adapters from 1

    def __call__(self, prompts: list, trainer: Any) -> dict[str, list]:
        """Complete each prompt once.

        Args:
            prompts: strings, or lists of messages.
            trainer: the trainer that asks.

        Returns:
            `prompt_ids`, `completion_ids` and `logprobs` (of the sampled tokens), each one list for each prompt.

        Raises:
            ValueError: training runs on several processes.
        """
        from vllm import SamplingParams

        args = trainer.args
        if trainer.accelerator.num_processes > 1:
            raise ValueError(
                f"VLLMRollouts runs in one process, and there are {trainer.accelerator.num_processes}. Leave "
                "rollout_func out, so that the model itself generates."
            )
        state, step = trainer.state, trainer.state.global_step
        # Outside of training nothing tells whether the adapter has changed, as it does with load_best_model_at_end.
        if state is not self._state or step != self._step or not trainer.is_in_train:
            self._load(trainer)
            self._state, self._step = state, step
        sampling = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            "logprobs": 0,
            "detokenize": False,
            **(args.generation_kwargs or {}),
            **self.sampling,
        }
        prompt_ids = [_tokenize(prompt, trainer.processing_class) for prompt in prompts]
        outputs = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            SamplingParams(**sampling),
            lora_request=self._request,
            use_tqdm=False,
        )
        completions = [output.outputs[0] for output in outputs]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "logprobs": [
                [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs)]
                for completion in completions
            ],
        }

    def _load(self, trainer: Any) -> None:
        """Put the adapter as it is now into a slot, in place of the one before."""
        from vllm.lora.request import LoRARequest

        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._request is not None:
            self.engine.llm_engine.remove_lora(self._request.lora_int_id)
        # A number that no other adapter has, or vLLM would answer by that one. And a name: vLLM keeps the keys and
        # values of prompts by it.
        self._number = max([self._number, *self.engine.llm_engine.list_loras()]) + 1
        name = model.active_adapter
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[name])
            path = folder if name == "default" else str(Path(folder, name))
            self._request = LoRARequest(f"rollouts-{self._number}", self._number, path)
            self.engine.llm_engine.add_lora(self._request)


def _tokenize(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
