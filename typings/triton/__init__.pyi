# Triton for pyright: everything is Any.  What stands under @triton.jit is Triton's language, not Python, and Triton
# is not installed everywhere that types are checked.
from typing import Any

def __getattr__(name: str) -> Any: ...
