"""How a block is run: the loop, attention, packed rows, heads, and the rules that choose between ways."""
