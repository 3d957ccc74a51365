-- What is settled is summed up anew: notes with a mean score of exactly a half were left out of the correct ones now and then. Locks settled runs for a moment.

update pgharness.runs set settled_notes = 0, reopenings = reopenings + 1 where settled_notes > 0;
delete from pgharness.settled_scores;
delete from pgharness.settled_note_scores;
delete from pgharness.settled_pairs;
delete from pgharness.settled_spreads;
