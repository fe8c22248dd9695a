"""SAT learns where a Transformer's attention matters, then trains only there. Rooms: see CONTRIBUTING.md."""
