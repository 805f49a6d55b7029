"""When does fine-tuning with LoRAMoE keep what the model knew? A study from scratch; docs/evidence.md is its protocol."""
