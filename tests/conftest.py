"""How the suite runs: which tests are fast, which files come first, one thread a worker. (Fixtures: fixtures.py)"""

import importlib
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: threads of neighbours that spin take longer than the work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
# Longest first: two processes that take a file at a time then end together. The second to the fifth need no base:
# where the tiny one is not built yet, the first file builds it, and nobody waits.
LONGEST = """test_train_online test_checkpoints test_analysis test_report test_pictures test_online_stops
    test_train_staged test_rollouts test_train_rl test_explain test_dist test_adapter_base test_train_sft test_serve
    test_pages test_engine test_sft test_online_values test_export test_dpo test_run test_train_reward test_tiny
    test_evaluate test_reward test_ranks test_rejection test_staged""".split()
# `pytest -m fast`: pure functions, the config, the house rules.
FAST = """test_advantages test_analysis test_cache test_chat test_checkpoint test_comparison test_config
    test_clinical test_conala test_data test_dialogue test_docs test_fields test_functions test_house
    test_log test_losses test_metrics test_numbers test_optim test_pairs test_policy_losses
    test_preference_losses test_prompts test_ratings test_rewards test_safety test_statistics test_stats test_study
    test_tasks test_text test_versions""".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "fast: pure functions, the config, the house rules; under a minute")
    config.option.loadscopereorder = False  # xdist would begin with the files that have most tests
    hands_out_tests = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out_tests:  # that process needs no torch
        config.pluginmanager.register(importlib.import_module("tests.fixtures"))


def pytest_ignore_collect(collection_path, config):
    """Under `-m fast` the other files are not even imported."""
    slow = collection_path.suffix == ".py" and collection_path.stem not in FAST
    return True if slow and config.option.markexpr == "fast" else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in FAST:
            item.add_marker(pytest.mark.fast)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable: the rest stay as they are
