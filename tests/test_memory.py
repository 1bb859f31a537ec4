from pathlib import Path

import pytest

from internvl_engine.memory import memory


def test_what_is_available_is_part_of_all():
    found = memory()
    assert 0 < found["available"] <= found["total"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_it_is_what_the_kernel_says_or_a_container_allows():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kernel = 1024 * int(lines["MemTotal"].split()[0])
    assert memory()["total"] <= kernel * 1.01
