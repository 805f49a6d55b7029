"""Serve LoRAMoE adapters with inference engines: vLLM (`peft_loramoe.serving.vllm`, docs/serving.md)."""
