"""When does fine-tuning with LoRAMoE keep what the model knew? A study from scratch.

Docs/evidence.md is its protocol.
"""
