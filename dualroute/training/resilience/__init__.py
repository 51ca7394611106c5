"""What keeps a run alive, or ends it so that it can go on."""
