"What two runs must share to count as the same"

import torch


def same_log(run):
    return [{k: v for k, v in o.items() if k != "minutes"} for o in run.log_lines()]


def assert_same_state(a, b, place="checkpoint"):
    "Nested states, bit for bit"
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for k in a:
            if k != "seconds":
                assert_same_state(a[k], b[k], f"{place}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{place}.{i}")
    else:
        assert a == b, place
