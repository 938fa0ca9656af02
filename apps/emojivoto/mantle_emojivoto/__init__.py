"""emojivoto: the demo application (web, emoji, voting, vote-bot)."""
