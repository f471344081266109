import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_models.documents import positions_within, visible


@given(rows=st.integers(1, 12).flatmap(lambda length: st.lists(st.tuples(*[st.integers(0, 2)] * length), min_size=1)))
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_tokens_count_from_their_documents_begin_and_see_that_document(
    rows: list[tuple[int, ...]], padded: bool
) -> None:
    documents = torch.tensor(rows)
    mask = documents != 1 if padded else None
    places, seen = positions_within(documents), visible(documents, mask)
    for row, numbers in enumerate(rows):
        begins = [
            max(at for at in range(t + 1) if at == 0 or numbers[at] != numbers[at - 1]) for t in range(len(numbers))
        ]
        assert places[row].tolist() == [t - begin for t, begin in enumerate(begins)]
        parts = [None if padded and number == 1 else begin for number, begin in zip(numbers, begins, strict=True)]
        assert seen[row, 0].tolist() == [[query == key for key in parts] for query in parts]
