"""What travels between ranks, and in which order: who is there, groups, lanes, and the ladder made of them."""
