"""Whether the tokens that a run reads are those that were written, found out while it trains.

SHA-256 of all token files takes a second for each gigabyte or two, where disks are as fast: too long to wait for at
every start, and nothing beside a training. Each rank reads a share of the files.
"""

from __future__ import annotations

from threading import Thread

from mics_models.data import Corpus
from mics_models.data.token_files import Stream
from mics_models.sentences import sentence


class TokenCheck:
    """A thread that compares this rank's share of the token files with their checksums."""

    def __init__(self, corpus: Corpus, rank: int, world: int) -> None:
        streams = [side for side in (corpus.train, corpus.held_out) if isinstance(side, Stream)]
        self._files = [file for stream in streams for file in stream.files][rank::world]
        self.trouble = ""  # what is wrong with one of them
        self._thread = Thread(target=self._read, name="token check", daemon=True)  # which no end of a run waits for
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether all of the share was read, or something is wrong."""
        return not self._thread.is_alive()

    def _read(self) -> None:
        for file in self._files:
            try:
                file.verify()
            except (ValueError, OSError) as error:
                self.trouble = sentence(error)
                return
