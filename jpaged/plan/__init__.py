"""What a model would need and reach on hardware that is not there (`jpaged plan`).

For TPUs the engine's own steps are compiled by the TPU compiler, which needs no TPU; their memory
is the compiler's figure. Speed is a model everywhere: rooflines, and for TPUs the compiler's own
estimate of cycles. Nothing here is measured on the target, and nothing here serves requests.
"""
