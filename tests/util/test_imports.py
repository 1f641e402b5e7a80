"""What importing the package brings along."""

import subprocess
import sys


def test_the_compiler_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, we_surgery; print('torch._dynamo.eval_frame' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
