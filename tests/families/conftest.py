import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Several only get into each other's way on maps as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
