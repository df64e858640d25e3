"""Tables, text and figures as files."""
