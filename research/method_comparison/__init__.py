"""PEFT's comparison of its methods on MetaMathQA, run with LoRAMoE and anchors.

See README.md.
"""
