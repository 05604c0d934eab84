"""What every test stands on: two quiet threads, no network, and the shared data sets where they are."""

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from support import RENDEZVOUS, run_on_ranks


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_process_group_left():
    """A strategy of one process, too, makes a group; the next test wants its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        for name in RENDEZVOUS:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The contract on two processes, of callbacks or of precisions, by strategy: one job each for all the tests of a
    file (which run in one process: `make test`).
    """

    @functools.cache
    def results(strategy: str, part: str):
        folder = tmp_path_factory.mktemp(strategy)
        run_on_ranks(Path(__file__).with_name("contract.py"), folder, strategy, part, timeout=290)
        return torch.load(folder / "results.0.pt")

    return results


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Token and compile caches of the tests stay out of the user's."""
    os.environ["LIGHTNING_SLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data sets beside the checkout; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    return folder
