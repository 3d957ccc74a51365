-- What could run, and what it would cost: read before starting.

create or replace view pgharness.accepted_rubrics with (security_invoker = true) as
select latest.case_id, latest.case_name,
       row_number() over (partition by latest.case_id order by latest.validated_at desc, latest.rubric_id desc)::integer as author_rank,
       latest.author, latest.rubric_id, latest.validated_at, latest.criteria_count
  from (select distinct on (r.case_id, r.author)
               r.case_id, r.case_name, r.author, r.id as rubric_id, r.validated_at,
               jsonb_array_length(r.criteria) as criteria_count
          from pgharness.rubrics as r
         where r.validation = 'accepted' and r.is_human
         order by r.case_id, r.author, r.validated_at desc, r.id desc) as latest;
comment on view pgharness.accepted_rubrics is
'One row per case and human author: the author''s most recently accepted rubric, newest author first (author_rank from 1). A run grades with the first rubrics_per_case of them.';

create or replace view pgharness.eligible_cases with (security_invoker = true) as
select c.id as case_id, c.name as case_name, c.dataset,
       count(*)                              as author_count,
       array_agg(a.author order by a.author) as authors
  from pgharness.cases as c
  join pgharness.accepted_rubrics as a on a.case_id = c.id
 group by c.id
having count(*) >= 2;
comment on view pgharness.eligible_cases is
'One row per case with accepted rubrics by at least two different human authors: case, dataset, how many authors and who.';
