"What two runs must share to count as the same"

import torch


def same_log(run):
    return [{k: v for k, v in o.items() if k != "minutes"} for o in run.log_lines()]


def assert_same_state(a, b, at="checkpoint"):
    "Nested states, bit for bit"
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a:
            if k != "seconds":
                assert_same_state(a[k], b[k], f"{at}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{at}.{i}")
    else:
        assert a == b, at
