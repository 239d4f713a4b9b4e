"""What the paper printed, for comparison and for the calibration of the step-time model.

The paper: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023.

Numbers printed on bars or in the text are exact. Knees of the curves of Figure 12 were read off the
plots by eye: take them as good to a tenth.
"""

from typing import Final

SYSTEMS: Final = ("FasterTransformer", "Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "paged")
"""The systems in the paper's order; "paged" is vLLM in its figures and jpaged in ours."""

MEAN_LENGTHS: Final = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}
"""Figure 11: mean tokens of prompt and output."""

FIGURE_2: Final = {
    "Orca (Max)": {"tokens": 20.4, "reserved": 13.3, "internal": 57.3, "external": 8.9},
    "Orca (Pow2)": {"tokens": 26.8, "reserved": 17.9, "internal": 13.6, "external": 41.6},
    "Orca (Oracle)": {"tokens": 38.2, "reserved": 25.2, "internal": 0.0, "external": 36.6},
    "paged": {"tokens": 96.3},
}
"""Percent of the memory for K and V."""

FIGURE_12: Final = {
    ("opt-13b", "sharegpt"): (0.3, 0.5, 0.75, 1.1, 1.9),
    ("opt-66b", "sharegpt"): (0.1, 0.2, 0.4, 0.65, 0.95),
    ("opt-175b", "sharegpt"): (0.5, 1.0, 1.5, 1.8, 2.4),
    ("opt-13b", "alpaca"): (5.0, 7.0, 13.0, 20.0, 28.0),
    ("opt-66b", "alpaca"): (3.0, 5.0, 9.0, 13.0, 18.0),
    ("opt-175b", "alpaca"): (4.0, 6.0, 13.0, 16.0, 20.0),
}
"""Knees in requests a second, in the order of `SYSTEMS`; read by eye."""

FIGURE_12_GAINS: Final = {
    "Orca (Oracle)": (1.7, 2.7),
    "Orca (Max)": (2.7, 8.0),
    "FasterTransformer": (1.0, 22.0),
}
"""Range of the ratio of sustained rates that the text gives for ShareGPT; 22 is "up to"."""

FIGURE_13: Final = {
    "sharegpt": (2.0, (7.00, 9.81, 13.62, 30.42)),
    "alpaca": (30.0, (7.00, 43.24, 72.75, 132.44)),
}
"""Requests a second, and mean number of batched requests of the last four `SYSTEMS`."""

FIGURE_14_GAINS: Final = {"basic": 1.3, "beam 6": 2.3}
"""Over Orca (Oracle), OPT-13B on Alpaca."""

FIGURE_15: Final = {
    "alpaca": {"parallel": (6.09, 8.53, 9.79), "beam": (37.56, 53.13, 55.16)},
    "sharegpt": {"parallel": (16.2, 30.5), "beam": (44.3, 66.3)},
}
"""Percent of blocks saved: for Alpaca at n = 2, 4, 6; for ShareGPT the ends of the range."""

FIGURE_16_GAINS: Final = {"1-shot": (80, 1.67), "5-shot": (341, 3.58)}
"""Tokens of the shared prefix, and gain over Orca (Oracle)."""

FIGURE_17_GAIN: Final = 2.0
"""Over all three Orcas."""

FIGURE_18A_SLOWDOWN: Final = (0.20, 0.26)
"""Attention kernel over FasterTransformer's, block size 16."""

BLOCK_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Figures 18b and 19."""
