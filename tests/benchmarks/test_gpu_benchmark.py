"""The benchmark for a GPU, rehearsed: Triton's interpreter and small layers, from start to end."""

import sys

import gpu


def test_the_rehearsal_runs_to_its_end(launches, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--networks", "toy", "--modes", "lwe+mwe"]
    )
    gpu.main()
    # Four checks of three layers, then three steps; two writes and one pull back in the first.
    assert launches.count("by_fcs") == 3 + 3
    assert launches.count("amplify") == 3 + 4
    out, err = capsys.readouterr()
    assert "| toy | lwe+mwe | attached |" in out
    assert "nothing was written" in err
