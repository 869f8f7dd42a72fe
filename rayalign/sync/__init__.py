"""How weights travel from learner to engine, with a checksum of every tensor."""
