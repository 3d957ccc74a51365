# Makes the numbers that test_evaluation.py, test_agreement.py and test_power.py quote as R's. Not run by the tests.
# R 4.2.2 with clubSandwich, lme4, psych and pwr, from Debian 12: Rscript tests/unit/stats/reference.R
suppressMessages({library(clubSandwich); library(lme4); library(psych); library(pwr)})
options(digits = 15)
wave <- function(n, step) sin((1:n) * step)                       # the same numbers in any language
show <- function(label, ...) cat(label, format(c(...), digits = 15), "\n")

# A mean and a difference of two groups, 12 clusters of 1 to 12 values, the groups share clusters.
cluster <- rep(1:12, times = 1:12); n <- length(cluster)
value <- wave(n, 1.7) + 0.8 * sin(cluster * 2.3)
group <- factor(ifelse(sin((1:n) * 0.9) > 0.2, "b", "a"))
mean_fit <- lm(value ~ 1)
found <- coef_test(mean_fit, vcov = vcovCR(mean_fit, cluster = cluster, type = "CR2"), test = "Satterthwaite")
show("mean CR2 beta se df p", found$beta, found$SE, found$df_Satt, found$p_Satt)
difference_fit <- lm(value ~ group)
found <- coef_test(difference_fit, vcov = vcovCR(difference_fit, cluster = cluster, type = "CR2"), test = "Satterthwaite")
show("difference CR2 beta se df p", found$beta[2], found$SE[2], found$df_Satt[2], found$p_Satt[2])
nested <- factor(ifelse(cluster > 7, "b", "a"))                    # no cluster in both groups
nested_fit <- lm(value ~ nested)
found <- coef_test(nested_fit, vcov = vcovCR(nested_fit, cluster = cluster, type = "CR2"), test = "Satterthwaite")
show("nested CR2 beta se df p", found$beta[2], found$SE[2], found$df_Satt[2], found$p_Satt[2])

# Nested variance components: 8 cases x 3 notes x 2 grades.
case <- rep(1:8, each = 6); note <- rep(1:24, each = 2)
score <- 2 * sin(case * 5.1) + sin(note * 3.3) + 0.5 * wave(48, 7.7)
fit <- lmer(score ~ 1 + (1 | case) + (1 | note), control = lmerControl(optCtrl = list(ftol_abs = 1e-14, xtol_abs = 1e-14)))
show("variance parts case note grade", as.data.frame(VarCorr(fit))$vcov[c(2, 1, 3)])

# Agreement: Shrout & Fleiss (1979), table 2; two raters on 4 ordered categories.
judges <- matrix(c(9,2,5,8, 6,1,3,2, 8,4,6,8, 7,1,2,6, 10,5,6,9, 6,2,4,7), ncol = 4, byrow = TRUE)
icc <- ICC(judges, lmer = FALSE)$results
for (i in 1:6) show(paste("ICC", icc$type[i]), icc$ICC[i], icc$F[i], icc$p[i], icc$`lower bound`[i], icc$`upper bound`[i])
table4 <- matrix(c(11,3,1,0, 4,9,3,1, 1,2,12,4, 0,1,3,10), 4, byrow = TRUE)
kappa <- cohen.kappa(table4)
show("kappa unweighted low est high", kappa$confid[1, ])
show("kappa quadratic low est high", kappa$confid[2, ])
show("kappa linear", cohen.kappa(table4, w = 1 - abs(outer(1:4, 1:4, "-")) / 3)$weighted.kappa)

# Power.
show("power.t.test n", power.t.test(delta = 0.5, power = 0.8)$n, power.t.test(delta = 0.2, power = 0.9)$n,
     power.t.test(delta = 0.8, power = 0.95, alternative = "one.sided")$n)
show("power.t.test paired n", power.t.test(delta = 0.3, power = 0.8, type = "paired")$n)
show("power.t.test power", power.t.test(n = 20, delta = 0.6, strict = TRUE)$power)
show("pwr.t2n power", pwr.t2n.test(n1 = 12, n2 = 40, d = 0.7)$power)
show("pwr.anova n", pwr.anova.test(k = 4, f = 0.25, power = 0.8)$n, pwr.anova.test(k = 3, f = 0.1, power = 0.9)$n)
show("power.prop.test n", power.prop.test(p1 = 0.50, p2 = 0.75, power = 0.90)$n, power.prop.test(p1 = 0.85, p2 = 0.9, power = 0.8)$n)
show("power.prop.test power", power.prop.test(n = 50, p1 = 0.5, p2 = 0.75, strict = TRUE)$power)
show("pwr.t mde", pwr.t.test(n = 30, power = 0.8)$d, pwr.t.test(n = 30, power = 0.8, type = "paired")$d)
