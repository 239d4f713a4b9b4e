"""Few rows times a large weight: the matrix products of a decode step."""

from jpaged.pallas_kernels.linear.api import linear as linear
from jpaged.pallas_kernels.linear.api import num_splits as num_splits
from jpaged.pallas_kernels.linear.api import unsupported_reasons as unsupported_reasons
