"""Every matplotlib figure. Nothing else imports matplotlib."""
