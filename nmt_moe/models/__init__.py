"""Models for fairseq, which imports this package module by module.

fairseq imports `tasks/` in the same way. All other parts that must be registered with fairseq are
therefore imported in both packages.
"""

from nmt_moe import compat as compat
from nmt_moe import criterions as criterions
from nmt_moe import generation as generation
from nmt_moe import optim as optim
from nmt_moe import trainer as trainer
from nmt_moe.models._early_options import accept_early_options
from nmt_moe.models._fit import check_size
from nmt_moe.trainer import reading

accept_early_options()
reading.CHECKS.append(check_size)
