"""Tasks registered with fairseq.

fairseq imports this folder first, before it parses arguments; so what it does not look for by
itself is imported here.
"""

from nmt_moe import compat as compat
from nmt_moe import criterions as criterions
from nmt_moe import generation as generation
from nmt_moe import optim as optim
from nmt_moe import trainer as trainer
