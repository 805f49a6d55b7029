"""One colour for each method, in the figures of the studies and of the benchmarks.

Okabe and Ito's palette, which colour-blind readers can tell apart, and darker or paler colours for rarer methods.
"""

BLUE, SKY, ORANGE, GREEN, VERMILION, PINK, YELLOW = (
    *("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#F0E442"),
)
BLACK, GREY, BROWN, PURPLE, NAVY = "#000000", "#8C8C8C", "#8C510A", "#6A3D9A", "#1B2A6B"

# What is recommended has one colour under its names in the toy study, the SmolLM2 study and the benchmarks.
COLOURS = {
    "base": GREY,
    "full": BLACK,
    "lora": BLUE,
    "retain, kl": VERMILION,
    "null": VERMILION,
    "loramoe": VERMILION,
    # the SmolLM2 study
    "lora+anchors": SKY,
    "lora+kl": ORANGE,
    "lora+replay": NAVY,
    "lora, all linears": BROWN,
    "corda": GREEN,
    "corda+kl": "#1B5E20",
    "osf": PINK,
    "osf+kl": "#8E6C8A",
    "mica": YELLOW,
    "mica+kl": "#9C8F00",
    "full+kl": "#3C6E71",
    "null+replay": PURPLE,
    "paper": "#A6761D",
    "paper+replay": "#8DBF4F",
    "retain, balance only": "#A33B54",
    "retain": "#E7298A",
    # the toy study
    "lora-attention": SKY,
    "unbalanced": ORANGE,
    "printed": GREEN,
    # the benchmarks
    "loop": ORANGE,
    "loramoe-torch": PURPLE,
    "moe_peft": GREEN,
    "mixlora": PINK,
    "unsloth": SKY,
    "lorafusion": BROWN,
}
RECOMMENDED = {"retain, kl (anchor_kl_weight 0.3)", "null"}  # drawn as stars in the studies
