"""Repairs of fairseq, made when this package is imported.

Each is a small function that acts only where a test of the installed versions or of the arguments
says so, gives its reason, and has its own test. They replace names in fairseq's modules, which its
commands look up when they run; none edits a file. Importing twice repairs once.
"""

from nmt_moe.compat import (
    averages,
    batches,
    binarised_data,
    checkpoints,
    configuration,
    dictionaries,
    diverse_beams,
    errors,
    interactive,
    lines,
    model_kinds,
    options,
    precision,
    preprocessing,
    processes,
    samples,
    saving,
    splits,
    stops,
)

__all__ = ["REPAIRS"]

# In this order: what is repaired twice is repaired from the inside out.
REPAIRS = (
    checkpoints.ignore_unsafe_loading,
    checkpoints.read_checkpoints_safely,
    configuration.evaluate_literals_only,
    checkpoints.allow_configuration_in_broadcasts,
    checkpoints.explain_misfits,
    checkpoints.refuse_untied_weights,
    model_kinds.refuse_models_of_another_task,
    model_kinds.warn_of_other_directions,
    checkpoints.keep_numpy_out_of_checkpoints,
    checkpoints.copy_checkpoints_whole,
    saving.write_checkpoints_whole,
    saving.try_the_save_folder,
    saving.save_intervals_that_end_an_epoch,
    saving.never_take_nan_for_best,
    saving.stop_at_the_last_update,
    saving.name_metrics_that_are_not_computed,
    batches.keep_every_sentence,
    batches.name_texts_that_are_skipped_whole,
    samples.let_each_sentence_be_a_sample,
    samples.name_endless_lines,
    batches.name_sentences_longer_than_a_batch,
    binarised_data.check_binarised_data_when_loaded,
    binarised_data.drop_damaged_data_quietly,
    binarised_data.write_digests_of_binarised_data,
    dictionaries.keep_typed_marks_as_text,
    dictionaries.name_damaged_dictionaries,
    dictionaries.name_damaged_sentencepiece_models,
    dictionaries.cut_text_at_white_space_of_any_kind,
    lines.name_damaged_alignment_dictionaries,
    lines.read_lines_of_raw_data_by_one_rule,
    lines.read_lines_of_texts_by_one_rule,
    preprocessing.check_texts_before_preprocessing,
    preprocessing.warn_of_unknown_words_in_texts,
    splits.accept_validation_sets_that_are_all_named,
    splits.name_folders_without_data,
    splits.name_missing_target_sides,
    splits.name_uneven_sides,
    splits.name_validation_sets_that_are_left_out,
    interactive.skip_unreadable_lines,
    interactive.skip_lines_that_are_too_long,
    interactive.skip_constraints_with_unknown_words,
    interactive.report_odd_lines,
    interactive.forget_translated_lines,
    interactive.translate_blank_into_blank,
    precision.fix_half_precision_flags,
    precision.skip_overflowing_updates_on_cpu,
    options.let_validate_read_the_task_from_the_checkpoint,
    options.suggest_close_names,
    options.drop_warnings_of_libraries,
    processes.let_torchrun_train_on_cpu,
    processes.fix_distributed_config,
    diverse_beams.count_diverse_sentences_within_their_batch,
    stops.end_with_the_launcher,
    stops.explain_stops,
    averages.copy_integers_into_averages,
    errors.end_in_one_message,
)

for repair in REPAIRS:
    repair()
