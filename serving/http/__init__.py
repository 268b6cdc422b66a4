"""The server itself: connections, who is let in, routes, streams of events."""
