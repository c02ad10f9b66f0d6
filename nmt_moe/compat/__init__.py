"""The few repairs fairseq needs on today's Python and torch, made when this package is imported.

Each is a small function that acts only where a test of the installed versions or of the arguments
says so, gives its reason, and has its own test. All replace names in fairseq's modules, which its
commands look up when they run; none edits a file. Importing twice repairs once.
"""

from nmt_moe.compat.averages import copy_integers_into_averages
from nmt_moe.compat.batches import (
    keep_every_sentence,
    name_sentences_longer_than_a_batch,
    name_texts_that_are_skipped_whole,
)
from nmt_moe.compat.binarised_data import (
    check_binarised_data_when_loaded,
    drop_damaged_data_quietly,
    write_digests_of_binarised_data,
)
from nmt_moe.compat.checkpoints import (
    allow_configuration_in_broadcasts,
    copy_checkpoints_whole,
    explain_misfits,
    ignore_unsafe_loading,
    keep_numpy_out_of_checkpoints,
    read_checkpoints_safely,
    refuse_untied_weights,
)
from nmt_moe.compat.configuration import evaluate_literals_only
from nmt_moe.compat.dictionaries import (
    keep_typed_marks_as_text,
    name_damaged_dictionaries,
    name_damaged_sentencepiece_models,
)
from nmt_moe.compat.diverse_beams import count_diverse_sentences_within_their_batch
from nmt_moe.compat.errors import end_in_one_message
from nmt_moe.compat.interactive import (
    forget_translated_lines,
    report_odd_lines,
    skip_constraints_with_unknown_words,
    skip_lines_that_are_too_long,
    skip_unreadable_lines,
    translate_blank_into_blank,
)
from nmt_moe.compat.lines import (
    name_damaged_alignment_dictionaries,
    read_lines_of_raw_data_by_one_rule,
    read_lines_of_texts_by_one_rule,
)
from nmt_moe.compat.model_kinds import refuse_models_of_another_task, warn_of_other_directions
from nmt_moe.compat.options import (
    drop_warnings_of_libraries,
    let_validate_read_the_task_from_the_checkpoint,
    suggest_close_names,
)
from nmt_moe.compat.precision import fix_half_precision_flags, skip_overflowing_updates_on_cpu
from nmt_moe.compat.preprocessing import (
    check_texts_before_preprocessing,
    warn_of_unknown_words_in_texts,
)
from nmt_moe.compat.processes import fix_distributed_config, let_torchrun_train_on_cpu
from nmt_moe.compat.samples import let_each_sentence_be_a_sample, name_endless_lines
from nmt_moe.compat.saving import (
    name_metrics_that_are_not_computed,
    never_take_nan_for_best,
    save_intervals_that_end_an_epoch,
    stop_at_the_last_update,
    try_the_save_folder,
    write_checkpoints_whole,
)
from nmt_moe.compat.splits import (
    accept_validation_sets_that_are_all_named,
    name_folders_without_data,
    name_missing_target_sides,
    name_uneven_sides,
    name_validation_sets_that_are_left_out,
)
from nmt_moe.compat.stops import end_with_the_launcher, explain_stops

__all__ = [
    "accept_validation_sets_that_are_all_named",
    "allow_configuration_in_broadcasts",
    "check_binarised_data_when_loaded",
    "check_texts_before_preprocessing",
    "copy_checkpoints_whole",
    "copy_integers_into_averages",
    "drop_damaged_data_quietly",
    "drop_warnings_of_libraries",
    "count_diverse_sentences_within_their_batch",
    "end_in_one_message",
    "end_with_the_launcher",
    "evaluate_literals_only",
    "explain_misfits",
    "explain_stops",
    "fix_distributed_config",
    "fix_half_precision_flags",
    "forget_translated_lines",
    "ignore_unsafe_loading",
    "keep_every_sentence",
    "keep_numpy_out_of_checkpoints",
    "keep_typed_marks_as_text",
    "let_each_sentence_be_a_sample",
    "let_torchrun_train_on_cpu",
    "let_validate_read_the_task_from_the_checkpoint",
    "name_damaged_alignment_dictionaries",
    "name_damaged_dictionaries",
    "name_damaged_sentencepiece_models",
    "name_endless_lines",
    "name_folders_without_data",
    "name_metrics_that_are_not_computed",
    "name_missing_target_sides",
    "name_sentences_longer_than_a_batch",
    "name_texts_that_are_skipped_whole",
    "name_uneven_sides",
    "name_validation_sets_that_are_left_out",
    "never_take_nan_for_best",
    "read_lines_of_raw_data_by_one_rule",
    "read_lines_of_texts_by_one_rule",
    "read_checkpoints_safely",
    "refuse_models_of_another_task",
    "refuse_untied_weights",
    "report_odd_lines",
    "save_intervals_that_end_an_epoch",
    "skip_constraints_with_unknown_words",
    "skip_lines_that_are_too_long",
    "skip_overflowing_updates_on_cpu",
    "skip_unreadable_lines",
    "stop_at_the_last_update",
    "suggest_close_names",
    "translate_blank_into_blank",
    "try_the_save_folder",
    "warn_of_other_directions",
    "warn_of_unknown_words_in_texts",
    "write_checkpoints_whole",
    "write_digests_of_binarised_data",
]

ignore_unsafe_loading()
read_checkpoints_safely()
evaluate_literals_only()
allow_configuration_in_broadcasts()
explain_misfits()
refuse_untied_weights()
refuse_models_of_another_task()
warn_of_other_directions()
keep_numpy_out_of_checkpoints()
copy_checkpoints_whole()
write_checkpoints_whole()
try_the_save_folder()
save_intervals_that_end_an_epoch()
never_take_nan_for_best()
stop_at_the_last_update()
name_metrics_that_are_not_computed()
keep_every_sentence()
name_texts_that_are_skipped_whole()
let_each_sentence_be_a_sample()
name_endless_lines()
name_sentences_longer_than_a_batch()
check_binarised_data_when_loaded()
drop_damaged_data_quietly()
write_digests_of_binarised_data()
keep_typed_marks_as_text()
name_damaged_dictionaries()
name_damaged_sentencepiece_models()
name_damaged_alignment_dictionaries()
read_lines_of_raw_data_by_one_rule()
read_lines_of_texts_by_one_rule()
check_texts_before_preprocessing()
warn_of_unknown_words_in_texts()
accept_validation_sets_that_are_all_named()
name_folders_without_data()
name_missing_target_sides()
name_uneven_sides()
name_validation_sets_that_are_left_out()
skip_unreadable_lines()
skip_lines_that_are_too_long()
skip_constraints_with_unknown_words()
report_odd_lines()
forget_translated_lines()
translate_blank_into_blank()
fix_half_precision_flags()
skip_overflowing_updates_on_cpu()
let_validate_read_the_task_from_the_checkpoint()
suggest_close_names()
drop_warnings_of_libraries()
let_torchrun_train_on_cpu()
fix_distributed_config()
count_diverse_sentences_within_their_batch()
end_with_the_launcher()
explain_stops()
copy_integers_into_averages()
end_in_one_message()
