"""Deployed models keep what a forward frees: page faults are counted, in a process of their own."""

import platform
import subprocess
import sys

import pytest

from saccade.runners.allocator import steady_allocator

FAULTS = """
import resource, torch, timm
from saccade import AdaptiveViT
vit = timm.create_model("vit_tiny_patch16_224", depth=1)
model = AdaptiveViT(vit){deployed}

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def counted(deployed: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(deployed=deployed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_it_says_whether_it_worked():
    found = steady_allocator()
    assert isinstance(found, bool)
    if platform.libc_ver()[0] == "glibc":
        assert found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is known")
def test_a_deployed_model_keeps_freed_memory_and_a_plain_one_leaves_the_process_alone():
    pages = 4 * 64 * 2**20 // 2**21  # huge pages are the fewest faults that new memory can cost
    assert counted("") >= pages
    assert counted('.deploy("fp32")') < pages
