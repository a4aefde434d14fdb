"""Linears laid out for decoding: the same product whichever way round, and a row's bits are its own."""

import pytest
import torch

from common import products

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 9, 12, 16, 20, 32, 64, 70])
def test_a_product_in_bf16_is_that_of_fp64(rows, packed):
    """With an adapter beside the weight, packed (where that exists) and not."""
    torch.manual_seed(rows)
    x, weight, a = torch.randn(rows, 40), torch.randn(24, 40 + 3), torch.randn(3, 40)
    small = [t.to(torch.bfloat16) for t in (x, weight, a)]
    x, weight, a = (t.double() for t in small)
    low = (x @ a.T).to(torch.bfloat16).double()
    right = x @ weight[:, :40].T + low @ weight[:, 40:].T
    laid = products.pack(small[1]) if packed else small[1]
    assert laid.is_mkldnn == (packed and products.can_pack("cpu", torch.bfloat16))
    found = products.product(small[0], (laid, small[2]))
    assert found.shape == right.shape and (found - right).abs().max() < 0.02 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_not_packed_where_their_product_is_wrong(dtype, monkeypatch):
    """A kernel that is off by 3 %; a right one is taken where oneDNN has it."""
    products._packing_is_right.cache_clear()
    weight, right = torch.randn(24, 40).to(dtype), products._packed_product
    assert products.pack(weight).is_mkldnn == (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    products._packing_is_right.cache_clear()
    monkeypatch.setattr(products, "_packed_product", lambda x, weight: 1.03 * right(x, weight))
    assert products.pack(weight) is weight
    products._packing_is_right.cache_clear()


@pytest.mark.parametrize("rows", [1, 2, 9, 33, 128])
@pytest.mark.parametrize("width", [0, 3])
def test_a_packed_product_is_that_of_fp64(rows, width):
    """fp32, with and without an adapter beside the weight."""
    torch.manual_seed(rows)
    x, weight, a = torch.randn(rows, 640), torch.randn(1536, 640 + width), torch.randn(width, 640)
    packed = products.pack(weight)
    assert packed.is_mkldnn == hasattr(torch.ops.mkldnn, "_linear_pointwise")
    found = products.product(x, (packed, a if width else None))
    x, weight, a = x.double(), weight.double(), a.double()
    right = x @ weight[:, :640].T + (x @ a.T) @ weight[:, 640:].T
    assert found.shape == right.shape and (found - right).abs().max() < 1e-5 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1536, 640), (640, 2048), (24, 640), (640, 8), (512, 6912)])
def test_a_product_s_bits_do_not_depend_on_the_number_of_rows(shape, dtype):
    """Of Gemma's shapes and those of adapters, packed and not, at the first, a middle and the last place."""
    torch.manual_seed(0)
    weight, row = (0.05 * torch.randn(shape)).to(dtype), torch.randn(shape[1]).to(dtype)
    for laid in (products.pack(weight), weight):
        right = None
        for n in (*range(1, 21), 32, 33, 40, 64, 65, 100):
            for place in {0, n // 2, n - 1}:
                x = torch.randn(n, shape[1]).to(dtype)
                x[place] = row
                found = products.row_invariant(x, (laid, None))[place]
                right = found if right is None else right
                assert torch.equal(found, right), (n, place)
        assert (right.float() - weight.float() @ row.float()).abs().max() < 0.05 * right.float().abs().max()
