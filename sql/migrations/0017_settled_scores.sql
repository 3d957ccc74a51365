-- What is settled of a run is summed once: sums over the grades of its first replications. New tables and columns; locks runs for a moment.

alter table pgharness.runs
    add column settled_notes bigint not null default 0 constraint runs_settled_notes_check check (settled_notes >= 0),
    add column reopenings integer not null default 0;
comment on column pgharness.runs.settled_notes is
'Notes at the start of its plan (whole replications) that are all decided, with all their grades, and whose scores tables settled_* sum up. What reads scores adds the rest to these.';
comment on column pgharness.runs.reopenings is
'How often decided notes or grades of it were opened again (retry_failed, imports): nothing is settled then, and what was being summed up meanwhile is not used.';

-- No foreign keys to runs, as of grades: each row's would be looked up, and trigger _100_delete_items deletes what a cascade would.
create table pgharness.settled_scores (
    run_id        bigint not null,
    settled_notes bigint not null,
    cell          bigint not null,
    rubric_number integer not null,
    note_count    bigint not null,
    grade_count   bigint not null,
    mean_score    double precision not null,
    squares       double precision not null,
    min_score     double precision not null,
    max_score     double precision not null,
    constraint settled_scores_pkey primary key (run_id, settled_notes, cell, rubric_number)
);
comment on table pgharness.settled_scores is
'One row per cell of a run and rubric: the scores of settled notes by it, as _score_sums() gives them. Rows count while settled_notes is their run''s.';
comment on column pgharness.settled_scores.settled_notes is 'How many notes of the run were settled with this row.';
comment on column pgharness.settled_scores.cell is 'A note''s ordinal modulo the cells of its run: case, combination and overlap.';
comment on column pgharness.settled_scores.rubric_number is 'By which rubric of the case; 0 for the target.';
comment on column pgharness.settled_scores.squares is 'Sum of squares about the mean.';
comment on column pgharness.settled_scores.min_score is 'Lowest score of a note.';
comment on column pgharness.settled_scores.max_score is 'Highest score of a note.';

create table pgharness.settled_note_scores (
    run_id        bigint not null,
    settled_notes bigint not null,
    cell          bigint not null,
    note_count    bigint not null,
    scored_count  bigint not null,
    grade_count   bigint not null,
    correct_count bigint not null,
    total         double precision,
    squares       double precision not null,
    lowest        double precision,
    highest       double precision,
    constraint settled_note_scores_pkey primary key (run_id, settled_notes, cell)
);
comment on table pgharness.settled_note_scores is
'One row per cell of a run: its settled notes and their scores, each the mean of a note''s grades, as _note_sums() gives them. Rows count while settled_notes is their run''s.';
comment on column pgharness.settled_note_scores.settled_notes is 'How many notes of the run were settled with this row.';
comment on column pgharness.settled_note_scores.cell is 'A note''s ordinal modulo the cells of its run: case, combination and overlap.';
comment on column pgharness.settled_note_scores.scored_count is 'Notes with grades.';
comment on column pgharness.settled_note_scores.correct_count is 'Those with a score of at least 0.5.';
comment on column pgharness.settled_note_scores.total is 'Sum of their scores; null for none.';
comment on column pgharness.settled_note_scores.squares is 'Sum of squares about their mean.';
comment on column pgharness.settled_note_scores.lowest is 'Lowest score of a note.';
comment on column pgharness.settled_note_scores.highest is 'Highest score of a note.';

create table pgharness.settled_pairs (
    run_id        bigint not null,
    settled_notes bigint not null,
    cell          bigint not null,
    rubric_a      integer not null,
    rubric_b      integer not null,
    note_count    bigint not null,
    total_a       double precision not null,
    total_b       double precision not null,
    squares_a     double precision not null,
    squares_b     double precision not null,
    products      double precision not null,
    differences   double precision not null,
    min_a         double precision not null,
    max_a         double precision not null,
    min_b         double precision not null,
    max_b         double precision not null,
    constraint settled_pairs_pkey primary key (run_id, settled_notes, cell, rubric_a, rubric_b)
);
comment on table pgharness.settled_pairs is
'One row per cell of a run and pair of rubrics: sums over its settled notes that both graded, as _pair_sums() gives them. Rows count while settled_notes is their run''s.';
comment on column pgharness.settled_pairs.settled_notes is 'How many notes of the run were settled with this row.';
comment on column pgharness.settled_pairs.cell is 'A note''s ordinal modulo the cells of its run: case, combination and overlap.';
comment on column pgharness.settled_pairs.rubric_a is 'The first rubric of the pair; likewise every column with _a.';
comment on column pgharness.settled_pairs.rubric_b is 'The second one; likewise every column with _b.';
comment on column pgharness.settled_pairs.total_a is 'Sum of scores.';
comment on column pgharness.settled_pairs.total_b is 'Sum of scores.';
comment on column pgharness.settled_pairs.squares_a is 'Sum of squared scores.';
comment on column pgharness.settled_pairs.squares_b is 'Sum of squared scores.';
comment on column pgharness.settled_pairs.products is 'Sum of products of the two scores.';
comment on column pgharness.settled_pairs.differences is 'Sum of absolute differences of the two.';
comment on column pgharness.settled_pairs.min_a is 'Lowest score.';
comment on column pgharness.settled_pairs.max_a is 'Highest score.';
comment on column pgharness.settled_pairs.min_b is 'Lowest score.';
comment on column pgharness.settled_pairs.max_b is 'Highest score.';

create table pgharness.settled_spreads (
    run_id        bigint not null,
    settled_notes bigint not null,
    cell          bigint not null,
    rubric_number integer not null,
    note_count    bigint not null,
    grade_count   bigint not null,
    squares       double precision not null,
    differences   double precision not null,
    pair_count    bigint not null,
    constraint settled_spreads_pkey primary key (run_id, settled_notes, cell, rubric_number)
);
comment on table pgharness.settled_spreads is
'One row per cell of a run and rubric that graded settled notes several times: how far these grades differ, as _spread_sums() gives it. Rows count while settled_notes is their run''s.';
comment on column pgharness.settled_spreads.settled_notes is 'How many notes of the run were settled with this row.';
comment on column pgharness.settled_spreads.cell is 'A note''s ordinal modulo the cells of its run: case, combination and overlap.';
comment on column pgharness.settled_spreads.rubric_number is 'By which rubric of the case; 0 for the target.';
comment on column pgharness.settled_spreads.squares is 'Sum of squares about the mean of each note.';
comment on column pgharness.settled_spreads.differences is 'Sum of absolute differences over all pairs of grades.';
comment on column pgharness.settled_spreads.pair_count is 'Pairs of grades.';
