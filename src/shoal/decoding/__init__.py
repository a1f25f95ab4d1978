"""From a prompt to tokens: compiled steps, the decode loop, and those who listen to it."""
