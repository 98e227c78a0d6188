"""What answers a policy, turn by turn: tools, games, servers, and classes of one's own."""
