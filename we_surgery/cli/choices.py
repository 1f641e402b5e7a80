"""The choices of options, repeated here because the rooms that define them import torch.

A test compares each with its definition.
"""

DEFAULT_MODE = "lwe"
MODES = ("lwe", "mwe", "we", "lwe+mwe", "thesis", "none")
INITS = ("paper", "preserve")
STARTS = ("on", "paused")
KINDS = ("module", "state_dict", "safetensors")
DTYPES = ("float32", "float16", "bfloat16")
DEPLOY_FORMS = ("dense", "shift")
SCORES = ("accuracy", "log_likelihood")
GRANULARITIES = ("kernel", "channel_per_filter", "channel")
CRITERIA = ("multiplier", "magnitude", "random")
SWEEPS = ("epsilon", "reduction", "initialization", "no-normalization")
