import pytest
from instruction_sets import ISAS

from pydiffseq.ops import _extension


@pytest.fixture(params=ISAS)
def isa(request):
    if _extension.C is None:
        pytest.skip("the extension is not built")
    before = _extension.C.isa()
    if not _extension.C.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _extension.C.set_isa(before)
