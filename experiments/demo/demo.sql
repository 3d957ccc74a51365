-- The demo: two models write notes of six invented consultations, a third grades them by the rubrics of two clinicians.
--
-- Every consultation, clinician and rubric here is invented. The models are simulated: no network, no key, no real cost.
-- Run it with psql, as often as you like; it adds what is missing. Then, from psql or any client:
--
--     select * from pgharness.expected_workload where instance = 'demo';
--     select run_id from pgharness.start_run('demo');
--
-- and `pgharness worker --workers 2 --concurrency 10` in a shell. `pgharness demo` does all of it.

-- What is compared ----------------------------------------------------------------------------------------------------

insert into pgharness.projects (name, description)
values ('demo', 'Two simulated models on six invented consultations.')
on conflict do nothing;

-- A simulated model repeats a share of the facts of a consultation (quality), so better ones earn better grades. Now and
-- then one fails or answers nonsense, as real ones do: the harness tries again, and the calls and failures show it.
insert into pgharness.models (name, description, provider, parameters, input_usd_per_million, output_usd_per_million)
values
    ('demo/careful', 'Simulated: thorough, slow and dear.', 'simulator',
     '{"quality": 0.9, "output_tokens": 400, "latency_seconds": 0.7, "rate_limit_rate": 0.03}', 3.00, 15.00),
    ('demo/hasty', 'Simulated: leaves out half, quick and cheap.', 'simulator',
     '{"quality": 0.5, "output_tokens": 250, "latency_seconds": 0.35, "error_rate": 0.05}', 0.25, 1.25),
    ('demo/grader', 'Simulated: judges how much of each criterion a note covers.', 'simulator',
     '{"noise": 6, "latency_seconds": 0.3, "invalid_rate": 0.03}', 1.00, 5.00)
on conflict do nothing;

-- The consultations ---------------------------------------------------------------------------------------------------

insert into pgharness.datasets (name, description, version, source, license)
values ('demo', 'Eight invented primary-care consultations, six of them with rubrics by two clinicians.', '1', 'pgharness', 'MIT')
on conflict do nothing;

-- Written as lines for reading; stored as [{"speaker": "Doctor", "text": "..."}, ...].
insert into pgharness.cases (name, dataset, metadata, input)
select script.name, 'demo', jsonb_build_object('problem', script.problem),
       (select jsonb_agg(jsonb_build_object('speaker', split_part(turn.line, ': ', 1),
                                            'text', substr(turn.line, strpos(turn.line, ': ') + 2)) order by turn.number)
          from string_to_table(btrim(script.lines, E'\n'), E'\n') with ordinality as turn (line, number))
  from (values
('demo/sore-throat', 'sore throat', $$
Doctor: Good morning, come in and have a seat. What has brought you here today?
Patient: I have had a really sore throat for four days, and swallowing anything but yoghurt hurts.
Doctor: That sounds miserable. Have you noticed a temperature?
Patient: Yes, I measured 38.6 on Monday evening and 38.4 again last night.
Doctor: Any cough, runny nose or hoarseness along with it?
Patient: No cough at all, and my nose is clear.
Doctor: Are you able to drink, and have you had any trouble opening your mouth or breathing?
Patient: I can drink water and my mouth opens normally. Breathing is fine.
Doctor: Do you have any allergies to medicines?
Patient: Penicillin brought me out in a rash all over when I was nineteen.
Doctor: Thank you, that matters here. Let me look. Your tonsils are swollen with white exudate on both sides.
Doctor: And the glands at the front of your neck are tender and enlarged. Your temperature now is 38.2.
Patient: Is it the kind that needs antibiotics?
Doctor: With fever, exudate, tender glands and no cough, a bacterial infection is likely, so I suggest clarithromycin for five days because of your penicillin allergy.
Patient: Can I take something for the pain as well?
Doctor: Paracetamol and ibuprofen, alternating if needed. Come back at once if you cannot swallow fluids, drool or struggle to breathe.
Patient: I work with small children in a nursery. When can I go back?
Doctor: After twenty-four hours on the antibiotic and once the fever is gone, so most likely on Friday.
$$),
('demo/knee-injury', 'knee injury', $$
Doctor: I see you are limping. Tell me what happened.
Patient: I twisted my right knee playing football on Saturday. I turned and my foot stayed planted in the grass.
Doctor: Did you hear or feel anything at that moment?
Patient: I felt a pop, and by the evening the whole knee had swollen up.
Doctor: Could you carry on playing, or put weight on it afterwards?
Patient: No, I had to be helped off. I can walk now, but it gives way on stairs.
Doctor: Does the knee ever lock, so that you cannot straighten it?
Patient: It has not locked. It only feels unstable.
Doctor: Any earlier injury or operation on that knee?
Patient: Nothing on the knee. I broke my left wrist years ago, that is all.
Doctor: On examination there is a moderate effusion, and the Lachman test is loose compared with the left side.
Doctor: There is no tenderness over the bones, and you can bend it to a hundred degrees.
Patient: What does that mean for me?
Doctor: I suspect a tear of the anterior cruciate ligament. I am referring you for an MRI and to the knee clinic.
Patient: Should I rest it completely until then?
Doctor: Use crutches for a week, ice and elevation, ibuprofen with food, and start gentle bending exercises. No football.
$$),
('demo/blood-pressure', 'medication review', $$
Nurse: Hello, this is your review for blood pressure. How have you been getting on?
Patient: My readings at home are good, but this dry cough is driving me mad. It keeps my wife awake.
Nurse: When did the cough begin?
Patient: About six weeks ago, a fortnight or so after the ramipril was started.
Nurse: Do you bring anything up, or have you had fever or weight loss?
Patient: No, it is just a tickle. No fever, and my weight is steady at eighty-four kilos.
Nurse: Have you ever smoked?
Patient: I gave up fifteen years ago.
Nurse: Any swelling of your lips or face since starting the tablets?
Patient: Nothing like that.
Nurse: What do your home readings say?
Patient: Mostly around 132 over 80 in the mornings.
Nurse: Here it is 134 over 82, with a pulse of 68. Your kidney function and potassium were normal in last week's blood test.
Nurse: A dry cough is a known effect of ramipril. I have spoken to the doctor, and we would stop it and start losartan 50 milligrams once daily.
Patient: Will the cough go away?
Nurse: It usually settles within four weeks. We will repeat the kidney function and potassium in two weeks and see you in a month.
Patient: I also take ibuprofen for my back now and then. Is that all right?
Nurse: Better not with losartan, it can harm the kidneys. Please use paracetamol instead.
$$),
('demo/migraine', 'headache', $$
Doctor: You mentioned headaches on the phone. Tell me about them.
Patient: They come about twice a month. It is a throbbing pain on the left side that lasts most of a day.
Doctor: Is there anything that warns you before the pain starts?
Patient: Yes, zigzag lights at the edge of my vision for about twenty minutes.
Doctor: Do you feel sick, or do light and noise bother you?
Patient: I feel sick and lie down in a dark room. I have been sick twice.
Doctor: Have you ever had weakness, numbness or trouble speaking with it?
Patient: No, nothing like that.
Doctor: Has any headache been sudden and severe, or the worst of your life?
Patient: No, they build up slowly over an hour.
Doctor: What medicines do you take at the moment?
Patient: Only the combined contraceptive pill, for three years now. And ibuprofen, which hardly helps.
Doctor: Is there migraine in your family, or any clots or strokes?
Patient: My mother has migraine. No clots or strokes that I know of.
Doctor: Your blood pressure is 118 over 74, and the examination of your nerves and eyes is normal.
Doctor: This is migraine with aura. With aura the combined pill raises the risk of stroke, so I advise stopping it and changing to a progestogen-only pill.
Patient: I did not know that. And for the pain?
Doctor: Sumatriptan 50 milligrams when the pain begins, with an anti-sickness tablet. Keep a headache diary, and call an ambulance for any weakness or speech trouble.
$$),
('demo/child-fever', 'fever in a child', $$
Parent: Thank you for fitting us in. Mia is two, and she has been burning up since yesterday.
Doctor: Hello, Mia. How high has the temperature been?
Parent: It was 39.2 last night. Paracetamol brings it down for a few hours.
Doctor: What else have you noticed?
Parent: She keeps pulling at her right ear, and she was crying half the night.
Doctor: Is she drinking, and are there wet nappies?
Parent: She drinks milk and juice, and she has had four wet nappies today. She does not want to eat.
Doctor: Any rash, vomiting, or has she been drowsy or hard to wake?
Parent: No rash and no vomiting. She is grumpy, but she plays once the fever is down.
Doctor: Has she had ear infections before, and are her vaccinations up to date?
Parent: One last winter. She has had all her vaccinations.
Doctor: Her right eardrum is red and bulging, the left is normal. Her chest is clear, and her neck is soft.
Doctor: So this is an infection of the middle ear. Most get better by themselves within three days.
Parent: Does she need antibiotics?
Doctor: Not today. I will give you a delayed prescription for amoxicillin; use it if she is no better in three days, or if the ear discharges.
Parent: And until then?
Doctor: Paracetamol or ibuprofen for pain and plenty to drink. Bring her back at once if she gets drowsy, has a stiff neck or a rash that does not fade.
$$),
('demo/low-mood', 'low mood', $$
Doctor: Come in. You look tired. How can I help?
Patient: I have not been myself for about three months. I feel low most days and cannot enjoy anything.
Doctor: I am glad you came. Did something set it off?
Patient: My job. We lost half the team, and I do the work of two people. I have stopped seeing my friends.
Doctor: How are you sleeping and eating?
Patient: I wake at four every morning and lie there. I have lost five kilos without trying.
Doctor: When people feel like this, some think that life is not worth living. Have you had such thoughts?
Patient: Sometimes I think it would be easier not to wake up. I would not do anything, though. My daughter needs me.
Doctor: Thank you for telling me. Have you made any plan or harmed yourself, now or in the past?
Patient: No, never.
Doctor: How much alcohol do you drink?
Patient: More than I should. A bottle of wine most evenings at the weekend.
Doctor: Have you had depression before, or treatment for it?
Patient: No, this is the first time.
Doctor: Your questionnaire score is 17, which fits a moderately severe depression. I suggest talking therapy and sertraline 50 milligrams.
Patient: I would like to try the therapy. I am not sure about tablets.
Doctor: Then we start with the therapy, less alcohol, and a note for two weeks off work. I want to see you again in one week.
Patient: And if it gets worse before then?
Doctor: Call us or the crisis line at any hour; here is the number. Let us also do a blood test for your thyroid.
$$),
('demo/back-pain', 'back pain', $$
Doctor: What can I do for you today?
Patient: My lower back has hurt since I moved a wardrobe ten days ago.
Doctor: Does the pain go down either leg?
Patient: No, it stays across the small of my back.
Doctor: Any numbness around the groin, or trouble with your bladder or bowels?
Patient: No, nothing of the kind.
Doctor: Have you had fever, weight loss or cancer in the past?
Patient: No, I am healthy otherwise.
Doctor: You bend forward to the knees with some pain. Strength, reflexes and feeling in the legs are normal.
Patient: Do I need a scan?
Doctor: A scan would not change anything now. Keep moving, use heat and ibuprofen, and come back if it lasts six weeks.
Patient: I drive a delivery van. May I work?
Doctor: Yes, with light duties for a week and no heavy lifting.
$$),
('demo/itchy-rash', 'rash', $$
Doctor: Tell me about this rash.
Patient: It started three days ago on my hands and wrists, and it itches terribly.
Doctor: Have you used or touched anything new?
Patient: I have been clearing the garden, and there was ivy everywhere.
Doctor: Any swelling of the face, or trouble breathing?
Patient: No, only the itch and some little blisters.
Doctor: Do you have eczema or asthma?
Patient: I had eczema as a child.
Doctor: I see streaks of small blisters on red skin on both forearms, with no sign of infection.
Doctor: This is an allergic contact rash from the plants. I will prescribe a steroid cream for one week.
Patient: Is it catching? I have a baby at home.
Doctor: No, but wash your garden clothes, and wear gloves and long sleeves next time. Cetirizine at night helps with the itch.
$$)
       ) as script (name, problem, lines)
 order by script.name
on conflict do nothing;

-- The rubrics ---------------------------------------------------------------------------------------------------------

-- Written as "weight | criterion"; stored as [{"criterion": "...", "weight": 20}, ...]. A case is eligible when two
-- different people have an accepted rubric for it: demo/back-pain and demo/itchy-rash are not.
insert into pgharness.rubrics (case_name, author, validation, criteria)
select sheet.case_name, sheet.author, sheet.validation,
       (select jsonb_agg(jsonb_build_object('criterion', split_part(item.line, ' | ', 2),
                                            'weight', split_part(item.line, ' | ', 1)::integer) order by item.number)
          from string_to_table(btrim(sheet.lines, E'\n'), E'\n') with ordinality as item (line, number))
  from (values
('demo/sore-throat', 'okafor@clinic.example', 'accepted', $$
20 | Sore throat for four days with painful swallowing
20 | Fever measured at 38.6, and absence of cough
15 | Swollen tonsils with white exudate and tender neck glands
25 | Penicillin allergy with rash, and clarithromycin chosen because of it
20 | Return at once when unable to swallow fluids or breathe
$$),
('demo/sore-throat', 'lindqvist@clinic.example', 'accepted', $$
30 | Allergy to penicillin is stated
20 | Clarithromycin for five days
15 | Temperature 38.2 on examination, exudate on both tonsils
15 | Paracetamol and ibuprofen for pain
20 | Works in a nursery, back after twenty-four hours of antibiotic
$$),
('demo/knee-injury', 'okafor@clinic.example', 'accepted', $$
20 | Twisted right knee at football with the foot planted
20 | Felt a pop, knee swollen by the evening
20 | Gives way on stairs, feels unstable, has not locked
20 | Moderate effusion and loose Lachman test
20 | Referred for MRI and to the knee clinic for suspected cruciate ligament tear
$$),
('demo/knee-injury', 'lindqvist@clinic.example', 'accepted', $$
25 | Mechanism of injury: twisted on a planted foot
25 | Suspected tear of the anterior cruciate ligament
20 | No tenderness over the bones, bends to a hundred degrees
15 | No earlier injury or operation of the knee
15 | Crutches, ice, elevation, gentle bending exercises and no football
$$),
('demo/blood-pressure', 'okafor@clinic.example', 'accepted', $$
25 | Dry cough that began after ramipril was started
15 | No fever, steady weight, gave up smoking fifteen years ago
20 | Home readings around 132 over 80
25 | Ramipril stopped and losartan 50 milligrams started
15 | Kidney function and potassium repeated in two weeks
$$),
('demo/blood-pressure', 'lindqvist@clinic.example', 'accepted', $$
30 | Change from ramipril to losartan because of dry cough
20 | Blood pressure 134 over 82 with pulse 68
15 | No swelling of lips or face
20 | Ibuprofen avoided with losartan, paracetamol instead
15 | Cough expected to settle within four weeks, review in a month
$$),
('demo/migraine', 'okafor@clinic.example', 'accepted', $$
20 | Throbbing headache on the left side twice a month
20 | Zigzag lights for twenty minutes before the pain
15 | No weakness, numbness or trouble speaking
30 | Combined contraceptive pill stopped because aura raises the risk of stroke
15 | Sumatriptan 50 milligrams when the pain begins
$$),
('demo/migraine', 'lindqvist@clinic.example', 'accepted', $$
30 | Diagnosis of migraine with aura
30 | Change to a progestogen-only pill
10 | Mother has migraine, no clots or strokes in the family
10 | Blood pressure 118 over 74, normal examination of nerves and eyes
10 | Feels sick and lies down in a dark room
10 | Headache diary, ambulance for weakness or speech trouble
$$),
('demo/child-fever', 'okafor@clinic.example', 'accepted', $$
20 | Two years old with fever of 39.2 since yesterday
20 | Pulling at the right ear, crying at night
20 | Right eardrum red and bulging
20 | Delayed prescription for amoxicillin, to use after three days
20 | Return when drowsy, stiff neck or rash that does not fade
$$),
('demo/child-fever', 'lindqvist@clinic.example', 'accepted', $$
25 | Infection of the middle ear on the right
20 | Drinks milk and juice, four wet nappies
15 | No rash, no vomiting, plays once the fever is down
15 | Vaccinations complete, one ear infection last winter
25 | No antibiotics today, paracetamol or ibuprofen for pain
$$),
('demo/low-mood', 'okafor@clinic.example', 'accepted', $$
20 | Low most days for three months, cannot enjoy anything
15 | Wakes at four every morning, lost five kilos
30 | Thinks it would be easier not to wake up, no plan and no self-harm
15 | Prefers talking therapy to tablets
20 | Review in one week, crisis line number given
$$),
('demo/low-mood', 'lindqvist@clinic.example', 'accepted', $$
25 | Questionnaire score of 17, moderately severe depression
25 | Thoughts of death and the daughter as protective reason
15 | Alcohol: a bottle of wine most evenings at the weekend
15 | Work of two people since half the team was lost
20 | Two weeks off work and blood test for thyroid
$$),
('demo/back-pain', 'okafor@clinic.example', 'accepted', $$
40 | Lower back pain for ten days since moving a wardrobe
40 | No numbness around the groin, bladder and bowels normal
10 | Strength, reflexes and feeling in the legs normal
10 | Keep moving, heat and ibuprofen, no heavy lifting
$$),
('demo/back-pain', 'lindqvist@clinic.example', 'refused', $$
50 | Lower back pain
20 | Wardrobe
20 | Scan
10 | Van
$$),
('demo/itchy-rash', 'lindqvist@clinic.example', 'accepted', $$
30 | Itching rash on hands and wrists for three days
30 | Allergic contact rash after clearing ivy in the garden
20 | No swelling of the face or trouble breathing
20 | Steroid cream for one week, cetirizine at night
$$),
('demo/itchy-rash', 'llm', 'accepted', $$
40 | Rash with small blisters on red skin of both forearms
30 | Eczema as a child
15 | Not catching
15 | Gloves and long sleeves
$$),
('demo/itchy-rash', 'okafor@clinic.example', 'not_evaluated', $$
40 | Cause of the rash
30 | Treatment with steroid cream
20 | Advice on gloves and sleeves
10 | Eczema in childhood
$$)
       ) as sheet (case_name, author, validation, lines)
 where not exists (select from pgharness.rubrics as known where known.case_name = sheet.case_name and known.author = sheet.author)
 order by sheet.case_name, sheet.author;

-- The experiment ------------------------------------------------------------------------------------------------------

insert into pgharness.instances (name, project, experiment, description, note_replications, grade_replications, retry_delay_seconds, seed)
values ('demo', 'demo', 'note_grade', 'Does the careful model earn its price?', 3, 2, 0.5, 57)
on conflict do nothing;

select pgharness.add_cases('demo', eligible => true, dataset => 'demo') as cases_added;

insert into pgharness.model_combinations (instance, generator, grader)
values ('demo', 'demo/careful', 'demo/grader'),
       ('demo', 'demo/hasty', 'demo/grader')
on conflict do nothing;
