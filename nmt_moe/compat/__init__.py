"""The few repairs fairseq needs on today's Python and torch, made when this package is imported.

One addition, GNMT's search, is here too: fairseq has no registry for it.

Each is a small function that acts only where a test of the installed versions or of the arguments
says so, gives its reason, and has its own test. All replace names in fairseq's modules, which its
commands look up when they run; none edits a file. Importing twice repairs once.
"""

from nmt_moe.compat.checkpoints import (
    allow_checkpoint_types,
    copy_checkpoints_whole,
    explain_unreadable_checkpoints,
    keep_numpy_out_of_checkpoints,
)
from nmt_moe.compat.corpora import (
    keep_every_sentence,
    name_bytes_that_are_not_utf8,
    name_texts_that_are_skipped_whole,
    name_uneven_corpora,
)
from nmt_moe.compat.errors import end_in_one_message
from nmt_moe.compat.expert_checkpoints import save_and_load_spread_experts
from nmt_moe.compat.expert_parallel import spread_experts_over_processes
from nmt_moe.compat.gnmt_search import add_gnmt_search
from nmt_moe.compat.precision import let_half_precision_train_anywhere
from nmt_moe.compat.processes import let_torchrun_train_on_cpu, prepare_processes_and_input
from nmt_moe.compat.texts import (
    let_each_sentence_be_a_sample,
    name_empty_texts,
    name_endless_lines,
)

__all__ = [
    "add_gnmt_search",
    "allow_checkpoint_types",
    "copy_checkpoints_whole",
    "end_in_one_message",
    "explain_unreadable_checkpoints",
    "keep_every_sentence",
    "keep_numpy_out_of_checkpoints",
    "let_each_sentence_be_a_sample",
    "let_half_precision_train_anywhere",
    "let_torchrun_train_on_cpu",
    "name_bytes_that_are_not_utf8",
    "name_empty_texts",
    "name_endless_lines",
    "name_texts_that_are_skipped_whole",
    "name_uneven_corpora",
    "prepare_processes_and_input",
    "save_and_load_spread_experts",
    "spread_experts_over_processes",
]

allow_checkpoint_types()
explain_unreadable_checkpoints()
keep_numpy_out_of_checkpoints()
copy_checkpoints_whole()
keep_every_sentence()
name_texts_that_are_skipped_whole()
name_bytes_that_are_not_utf8()
name_uneven_corpora()
let_each_sentence_be_a_sample()
name_empty_texts()
name_endless_lines()
let_half_precision_train_anywhere()
let_torchrun_train_on_cpu()
prepare_processes_and_input()
spread_experts_over_processes()
save_and_load_spread_experts()
add_gnmt_search()
end_in_one_message()
