"""What tests share: checkpoints that they write, servers and terminals that they drive, waits."""
