"""What a real language model, SmolLM2-135M-Instruct, forgets when it is fine-tuned, and what keeps it.

See protocol.md.
"""
