"""Which tests show that a fault is survived: what `make faults` runs, each with the part of the promise that it keeps.

python tests/faults/catalogue.py      # prints them, for pytest
"""

from __future__ import annotations

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CORE, TRAINING, DATA = "tests/pipelines/core", "tests/pipelines/training", "tests/pipelines/data"
REGISTRY, TRACKING, KILL = "tests/pipelines/registry", "tests/pipelines/tracking", "tests/faults/test_kill.py"

FAULTS: dict[str, tuple[str, ...]] = {
    "a rank is killed": (
        f"{KILL}::test_sigkill_of_a_rank_at_step_7_costs_two_steps_and_no_bit",
        f"{KILL}::test_sigkill_of_the_launcher_takes_the_ranks_with_it",
        f"{CORE}/test_launcher.py::test_a_rank_killed_by_a_signal_stops_the_others_soon_and_is_named",
    ),
    "killed inside a save": (
        f"{TRAINING}/test_checkpoint.py::test_sigkill_inside_a_save_costs_at_most_that_checkpoint",
        f"{KILL}::test_sigkill_inside_a_save_of_the_real_trainer",
    ),
    "a shard is cut or flipped": (
        f"{KILL}::test_damaged_checkpoints_fall_back_and_are_counted",
        f"{KILL}::test_when_every_checkpoint_is_damaged_the_run_refuses_to_start_from_zero",
        f"{TRAINING}/test_checkpoint.py::test_a_bit_that_flips_on_its_way_to_the_disk_is_caught",
        f"{CORE}/test_artifact.py::test_no_flipped_bit_passes",
    ),
    "preemption": (
        f"{KILL}::test_sigterm_saves_on_all_ranks_at_one_step_and_ends_with_75",
        f"{KILL}::test_sigterm_to_one_rank_stops_all_of_them",
        f"{CORE}/test_launcher.py::test_a_second_signal_does_not_wait_for_the_grace",
    ),
    "a full disk": (
        f"{TRAINING}/test_room.py::test_a_training_without_room_is_refused_before_it_starts",
        f"{TRAINING}/test_room.py::test_a_disk_that_fills_while_training_stops_it_and_it_goes_on_to_the_same_bytes",
        f"{CORE}/test_disk.py::test_a_stage_on_a_full_disk_says_what_to_do_leaves_nothing_and_completes_later",
    ),
    "numbers that are not finite": (
        f"{KILL}::test_nan_on_one_rank_is_skipped_by_all_and_bounded",
        f"{KILL}::test_a_skipped_step_changes_no_weight",
        f"{KILL}::test_a_spike_on_one_rank_takes_all_back_and_a_kill_after_that_changes_no_bit",
    ),
    "a rank hangs": (
        f"{KILL}::test_a_hung_rank_is_found_and_the_run_goes_on_to_the_same_bytes",
        f"{CORE}/test_launcher.py::test_a_slow_rank_is_not_killed",
    ),
    "two runs of one stage": (
        f"{KILL}::test_two_runs_of_one_stage_at_once_train_once",
        f"{CORE}/test_run_stage.py::test_of_four_processes_exactly_one_runs_each_body_and_all_get_the_same",
        f"{CORE}/test_object_store.py::test_a_holder_that_slept_past_its_lease_cannot_publish",
    ),
    "clocks that are wrong": (
        "tests/faults/test_clock.py::test_files_of_1970_and_2100_change_nothing",
        f"{CORE}/test_launcher.py::test_heartbeats_are_told_by_change_so_a_wrong_clock_kills_nobody",
    ),
    "S3 goes away": (
        (
            f"{CORE}/test_object_store.py::"
            "test_a_server_that_comes_back_is_waited_for_and_one_that_stays_away_ends_with_a_clear_fault"
        ),
        (
            f"{CORE}/test_object_store.py::"
            "test_what_was_uploaded_without_a_manifest_is_no_artifact_and_an_aborted_upload_leaves_nothing"
        ),
        (
            f"{CORE}/test_object_store.py::"
            "test_wrong_credentials_and_a_missing_bucket_are_named_at_once_and_no_secret_is_told"
        ),
    ),
    "MLflow goes away, or is slow": (
        f"{TRACKING}/test_outage.py::test_a_server_that_hangs_from_step_5_to_15_loses_no_step",
        f"{TRACKING}/test_outage.py::test_what_was_missed_is_sent_when_mlflow_comes_back",
        f"{TRACKING}/test_outage.py::test_a_slow_server_is_asked_little_and_delays_nothing",
        f"{REGISTRY}/test_slow_registry.py::test_a_promotion_asks_for_nothing_twice",
        f"{REGISTRY}/test_stage.py::test_a_dead_mlflow_refuses_the_promotion_as_pending",
    ),
    "Prefect goes away": (
        "tests/flows/test_prefect_server.py::test_a_configured_server_is_used_and_must_answer",
        "tests/flows/test_prefect_server.py::test_a_server_that_goes_away_in_mid_run_changes_nothing",
        "tests/flows/test_prefect_server.py::test_three_runs_may_start_together",
    ),
    "a corrupt corpus": (
        f"{DATA}/test_stage.py::test_a_corrupt_corpus_gives_the_bytes_of_the_clean_one_and_lists_every_bad_record",
        f"{DATA}/test_reader.py::test_a_compressed_shard_cut_short_is_reported_as_damaged",
    ),
    "data that changes under the run": (
        f"{DATA}/test_versioning.py::test_a_flipped_byte_is_refused_naming_the_file_both_hashes_and_the_repair",
        f"{DATA}/test_versioning.py::test_a_damaged_cache_is_never_taken_for_the_corpus",
        f"{DATA}/test_stage.py::test_a_corpus_that_changes_after_its_verification_is_refused",
    ),
    "a poisoned corpus": (
        f"{DATA}/test_stage.py::test_planted_copies_are_dropped_and_counted_and_unique_documents_stay",
        f"{DATA}/test_contamination.py::test_the_stage_refuses_more_than_it_was_told_to_bear_and_names_the_documents",
    ),
    "pickles": (
        f"{DATA}/test_shards.py::test_an_object_array_is_refused_and_never_unpickled",
        f"{REGISTRY}/test_loading.py::test_pickled_evidence_is_refused_and_not_run",
        f"{REGISTRY}/test_initial_weights.py::test_a_folder_without_model_or_with_pickled_weights_is_refused",
    ),
    "files that are no weights": ("tests/contracts/test_parsers.py::test_weights_are_tensors_or_damaged",),
    "names that lead out": (
        f"{CORE}/test_safe_path.py::test_a_name_that_leads_out_is_refused_with_where_it_stands",
        f"{CORE}/test_safe_path.py::test_no_name_leads_out",
        f"{DATA}/test_expand.py::test_a_bomb_is_refused_before_it_fills_the_memory",
    ),
    "a wrong configuration": (
        "tests/flows/test_recipe.py::test_a_wrong_setting_is_refused_by_path_value_and_nearest_name",
        "tests/contracts/test_parsers.py::test_a_recipe_is_a_configuration_or_refused",
        "tests/contracts/test_parsers.py::test_an_override_is_taken_or_refused",
    ),
    "another number of ranks": (
        "tests/faults/test_elastic.py::test_a_run_goes_on_under_another_sharding",
        "tests/faults/test_elastic.py::test_from_four_ranks_to_two",
        "tests/faults/test_elastic.py::test_a_split_that_does_not_work_out_is_refused_by_the_settings",
    ),
    "LISA across a kill": (
        f"{KILL}::test_lisa_goes_on_in_mid_interval_with_the_same_layers",
        "tests/exactness/test_zero.py::test_lisa_moves_active_tensors_and_no_byte_of_a_frozen_one",
    ),
    "LAMB under sharding": (
        "tests/exactness/test_zero.py::test_trust_ratios_are_those_of_one_plain_process_on_every_rank",
        "tests/exactness/test_zero.py::test_lamb_handed_naively_to_zero_is_another_algorithm",
    ),
    "a promotion is cut off": (
        f"{REGISTRY}/test_interruptions.py::test_a_promotion_killed_between_version_and_alias_is_completed_by_the_next",
        f"{REGISTRY}/test_interruptions.py::test_two_promotions_at_once_leave_one_champion",
        f"{REGISTRY}/test_stage.py::test_bytes_that_come_back_changed_stop_the_promotion",
        f"{REGISTRY}/test_stage.py::test_rollback_restores_the_previous_champion_again_and_again",
    ),
    "secrets": (
        f"{REGISTRY}/test_stage.py::test_no_secret_reaches_registry_history_or_card",
        f"{TRACKING}/test_session.py::test_no_secret_reaches_anything_that_is_stored",
        "tests/flows/test_runner.py::test_no_secret_of_an_error_is_on_record",
    ),
}
"""What goes wrong -> the tests, as pytest names them. The soak, which mixes them, is `make soak`."""


def missing() -> list[str]:
    """Return the tests of the catalogue that are not there."""
    return [test for tests in FAULTS.values() for test in tests if not _is_there(*test.split("::"))]


def _is_there(path: str, name: str) -> bool:
    file = CHECKOUT / path
    tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(test for tests in FAULTS.values() for test in tests)))
