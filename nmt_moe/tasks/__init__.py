"""Register this project's tasks with fairseq.

fairseq imports this package first, before it parses arguments. Therefore, this package imports the
project's other packages that fairseq does not import by itself.
"""

from nmt_moe import compat as compat
from nmt_moe import criterions as criterions
from nmt_moe import generation as generation
from nmt_moe import optim as optim
from nmt_moe import trainer as trainer
